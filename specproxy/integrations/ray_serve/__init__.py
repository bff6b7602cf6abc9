"""The server as a Ray Serve application: replicas on one machine or many; the extra `specproxy[ray]`.

options.py    what an operator decides, from keywords or from `serve run name=value`
replica.py    one replica: its models, its engine, its application

Ray is imported when an application is built, so that options can be checked without it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from specproxy.errors import ConfigurationError

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["build_app"]

_NEEDED = ("ray", "fastapi", "uvicorn", "openai", "prometheus_client")


def build_app(options: Mapping[str, Any]) -> Application:
    """An application for `serve.run`, and for `serve run specproxy.integrations.ray_serve:build_app name=value ...`.

    Nothing is loaded here: every replica loads its own models.

    Args:
        options: fields of `ReplicaOptions` by name; values may be the texts that a command line gives.

    Returns:
        A bound deployment, named "specproxy".

    Raises:
        ConfigurationError: an option that is not known or not usable, or a package that is missing.

    Example:
        >>> serve.run(build_app({"demo": "arithmetic", "num_replicas": 2}))
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(f"Ray Serve needs {', '.join(missing)}: pip install 'specproxy[ray]'.")
    from specproxy.integrations.ray_serve.options import parse_replica_options
    from specproxy.integrations.ray_serve.replica import Replica, bind

    return bind(Replica, parse_replica_options(options))
