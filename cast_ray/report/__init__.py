"""From a run folder to HTML, Markdown, LaTeX, CSV and JSON. Knows neither store nor Ray."""
