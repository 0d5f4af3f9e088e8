"""Stands before torchmetrics on the path of commands that tests start: it is not installed, as after ``make demo``.

Fabric imports it for its version alone, and with it Transformers: half of all the time that such a command needs.
"""

raise ImportError("left out of the commands that tests start")
