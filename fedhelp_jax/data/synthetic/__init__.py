"""Generated images and volumes for demonstrations and tests: **synthetic, not medical data**."""
