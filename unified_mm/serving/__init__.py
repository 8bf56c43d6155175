"""A trained run over HTTP: routes, limits, metrics, and the page that people look at."""
