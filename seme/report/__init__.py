"""What is told about a merge: the model card, the plan as text."""

from seme.report.card import model_card
from seme.report.plan import plan_as_dict, plan_as_text

__all__ = ["model_card", "plan_as_dict", "plan_as_text"]
