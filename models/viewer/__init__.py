"""Everything that only view_interactive_4pane_brats.py needs."""
