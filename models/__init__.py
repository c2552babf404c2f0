"""The package that the scripts share."""
