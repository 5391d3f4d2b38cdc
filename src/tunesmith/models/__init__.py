"""The language model we train and run: config, weights in and out, decoder, adapters, quantised bases, fallback."""
