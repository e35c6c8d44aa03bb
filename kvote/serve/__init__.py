"""An OpenAI-compatible server in which the cache policy is a field of the request."""
