"""An HTTP server in OpenAI's protocol over an engine; the extra `specproxy[serve]`.

wire.py       requests as clients write them, checked
settings.py   what an operator decides
grammars.py   what answers are held to, compiled
service.py    prompts become ids, requests become handles
follow.py     handles become text
answers.py    text becomes answers, whole or in chunks
logprobs.py   logarithms of probabilities in the forms of both APIs
streams.py    server-sent events, clients that leave
errors.py     failures in OpenAI's form
gate.py       names, key, bounds and the log of requests
metrics.py    figures for Prometheus
playground.py a page to try all this
routes.py     the routes
app.py        the application
run.py        uvicorn around it, draining at its end
logs.py       logs of lines of JSON
"""

from specproxy.server.app import create_app
from specproxy.server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
