"""`longverse serve`: an OpenAI-compatible server for one model on one machine, and its page. See docs/api.md."""
