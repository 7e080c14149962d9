"""Parts of web servers that `serve`, `view` and other pages share: access, logs, metrics, health and limits."""
