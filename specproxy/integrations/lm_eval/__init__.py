"""lm-evaluation-harness (extra `eval`): its tasks on a proxy-tuned model, generation through the speculative loop.

Importing this registers the model `specproxy` with the harness.
"""

from specproxy.integrations.lm_eval.model import ProxyTunedLM
from specproxy.integrations.lm_eval.run import Evaluation, evaluate_tasks

__all__ = ["Evaluation", "ProxyTunedLM", "evaluate_tasks"]
