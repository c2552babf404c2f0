"""Running a trained network: predictions, engines, exported files."""
