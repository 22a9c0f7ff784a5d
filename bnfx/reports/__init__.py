"""What was done, as records, text, Markdown, HTML and pictures."""
