"""What is compared, how it is judged, and what the judgement says. Reads run folders; never imports torch."""
