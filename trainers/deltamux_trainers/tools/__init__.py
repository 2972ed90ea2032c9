"""What is done with trained adapters and with data: merge, convert, compose, compress, evaluate, check data."""
