"""`transkimmer bench`: dense and skimming models side by side, in one process, on real text."""
