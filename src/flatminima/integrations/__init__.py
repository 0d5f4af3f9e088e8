"""The regularizer in trainers people already use; nothing else in the library imports these modules."""
