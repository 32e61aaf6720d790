"""What every long run needs and no paper mentions. Nothing here imports from the top level."""
