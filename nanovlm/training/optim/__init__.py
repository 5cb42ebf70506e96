"""AdamW, plain and with 8-bit moments, and the learning rate of each part."""
