"""Measures of forgetting: success of attacks, and distances to models trained without the forgotten instances.

The measures are small functions on arrays, for any model. Every measure has a direction, and an expected value for the
retrained model (*oracle*), which was trained without the forgotten instances. A value beyond the value of the oracle is
no better than a value short of it.
"""

from munkey.audit.distances import Distance, average_gap, kl_of_margins, kolmogorov_smirnov, tug_of_war
from munkey.audit.erasure import ErasureReport, erasure_report
from munkey.audit.inside import InsideView, inside_attacks, inside_view, worst_attack
from munkey.audit.membership import Attack, area_under_curve, attack, membership_scores
from munkey.audit.pathways import PathwayAccuracies, pathway_accuracies
from munkey.audit.references import classifier_scores, confidence_features, lira_scores, margins, rmia_scores
from munkey.audit.relearning import relearning_curve, steps_to_reach

__all__ = [
    "Attack",
    "Distance",
    "ErasureReport",
    "InsideView",
    "PathwayAccuracies",
    "area_under_curve",
    "attack",
    "average_gap",
    "classifier_scores",
    "confidence_features",
    "erasure_report",
    "inside_attacks",
    "inside_view",
    "kl_of_margins",
    "kolmogorov_smirnov",
    "lira_scores",
    "margins",
    "membership_scores",
    "pathway_accuracies",
    "relearning_curve",
    "rmia_scores",
    "steps_to_reach",
    "tug_of_war",
    "worst_attack",
]
