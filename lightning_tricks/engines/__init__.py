"""The seam: what a trick may ask of whatever strategy trains."""
