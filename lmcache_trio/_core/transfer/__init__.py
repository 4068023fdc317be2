"""What is decided for the device: which copies are started next, and what memory an engine exports for them."""
