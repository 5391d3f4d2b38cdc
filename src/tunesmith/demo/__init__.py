"""The bundled model and data, and the scripts that make them."""
