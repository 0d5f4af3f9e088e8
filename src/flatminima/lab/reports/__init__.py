"""What experiments show, as tables, figures, pages and a live view."""
