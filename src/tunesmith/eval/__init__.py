"""The judge: likelihood and generated answers of every arm, on the same rows, by the same code."""
