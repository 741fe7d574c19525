"""What happens to trained weights: averaging, export."""
