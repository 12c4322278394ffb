"""How faithful a head is and what it reads: measures over any `Head`, and the run over a checkpoint's texts."""

from flashhead_edge.evaluation.measures import Contender, Dense, Evaluation, Found, HeadContender, Measured, as_json, evaluate, measure_all, summarise
from flashhead_edge.evaluation.run import evaluate_checkpoint
from flashhead_edge.intervals import wilson

__all__ = [
    "Contender",
    "Dense",
    "Evaluation",
    "Found",
    "HeadContender",
    "Measured",
    "as_json",
    "evaluate",
    "evaluate_checkpoint",
    "measure_all",
    "summarise",
    "wilson",
]
