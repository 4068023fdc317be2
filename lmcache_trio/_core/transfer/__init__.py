"""The decisions for the device: which copies start next, and which memory an engine exports for them."""
