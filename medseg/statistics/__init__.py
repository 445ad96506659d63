"""What lists of measures say: summaries with their uncertainty, paired tests, rankings; no tables, no files."""

from __future__ import annotations

from medseg.statistics._agreement import BlandAltman, bland_altman, cases_needed, cases_to_show, unit_sd
from medseg.statistics._intervals import CONFIDENCE, MINIMUM_UNITS, RESAMPLES, SEED, Floats
from medseg.statistics._paired import PERMUTATIONS, PairedTest, compare_pair, compare_pairs, differences_of, holm
from medseg.statistics._ranking import Ranking, rank_all, rank_methods
from medseg.statistics._summary import Summary, summarise, summarise_all

__all__ = [
    "CONFIDENCE",
    "MINIMUM_UNITS",
    "PERMUTATIONS",
    "RESAMPLES",
    "SEED",
    "BlandAltman",
    "Floats",
    "PairedTest",
    "Ranking",
    "Summary",
    "bland_altman",
    "cases_needed",
    "cases_to_show",
    "compare_pair",
    "compare_pairs",
    "differences_of",
    "holm",
    "rank_all",
    "rank_methods",
    "summarise",
    "summarise_all",
    "unit_sd",
]
