"""One offline HTML page and a Markdown card, made from `comparison.json` and the run folders alone."""
