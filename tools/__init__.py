"""Programs beside the autoencoder itself: python -m tools.NAME, from the repository's root."""
