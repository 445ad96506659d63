"""What each number of a report means, in plain sentences; no numbers."""

from __future__ import annotations

from medseg.evaluate.options import EvaluateOptions
from medseg.metrics.lesions import LesionRule

_SURFACES = {
    "surfel": "marching-cubes surface elements weighted by their area, as in DeepMind's surface-distance",
    "voxel": "voxels of the label that have a neighbour outside across a face, as in MONAI",
}
_MEASURES = {
    "dice": "2TP / (2TP + FP + FN). Not defined where both are empty; 0 where only one of the two has the label.",
    "iou": "TP / (TP + FP + FN), with the same edge cases.",
    "precision": "TP / (TP + FP); not defined where nothing was predicted.",
    "recall": "TP / (TP + FN); not defined where the reference is empty.",
    "specificity": "TN / (TN + FP) over all voxels of the image: close to 1 for every small label, whatever its Dice.",
    "hd_mm": "Largest distance between the two surfaces. Infinite where only one of the two has the label.",
    "hd95_mm": "The larger of the two directed 95th percentiles of the distances between the surfaces.",
    "assd_mm": "Mean distance over both surfaces, weighted by the size of their elements.",
    "masd_mm": "Mean of the two directed mean distances: each surface counts the same, whatever its size.",
    "relative_volume_difference": "(Prediction − reference) / reference volume; not defined where the reference is "
    "empty.",
}
_EXTRA = {
    "boundary_iou": "IoU of those parts of both maps that lie within the tolerance of the NSD from their own contour "
    "(Cheng et al. 2021).",
    "cldice": "Centre-line Dice (Shit et al. 2021): how much of each skeleton lies in the other map.",
}
_SUMMARIES = {
    "volumes": "Millilitres, from the volume of a voxel; not given for two-dimensional images. Difference: "
    "prediction − reference. In pictures without a physical size a pixel counts as 1 mm.",
    "agreement": "Bland–Altman: bias is the mean difference of the volumes; 95% of the differences of new cases are "
    "expected between the limits, bias ± 1.96 SD. Cases in which neither has the label are left out; scans of one "
    "patient count one by one.",
    "status": "ok: both have the label. missed: only the reference has it. spurious: only the prediction has it. "
    "both_empty: neither has it; left out of means and counted. missing_prediction: no prediction was found; left "
    "out of all summaries and counted.",
    "mean": "Mean and standard deviation are those of the finite values, with their number where some are infinite "
    "(n_finite). Median and quartiles include infinite values, written as inf.",
    "ci95": "95% bootstrap interval of the mean over cases (BCa, else percentile, widened for few cases); not given "
    "below three cases.",
    "cases_needed": "How many cases like these a 95% interval of the mean Dice of ± 0.01, 0.02 or 0.05 would take, "
    "from the standard deviation found; not given below three cases. Cases in which the label has no Dice do not "
    "count.",
    "foreground": "Mean over the labels of each case, then summarised over cases.",
}


def definitions(options: EvaluateOptions, *, groups: bool, subgroups: bool) -> dict[str, str]:
    """A sentence or two for each term of the report. `groups`: patients are known; `subgroups`: there are any."""
    own = options.own_tolerances_mm
    tolerance = f"{options.usual_tolerance_mm:g} mm"
    if own:
        tolerance += f" ({', '.join(f'{name}: {mm:g} mm' for name, mm in own.items())})"
    texts = {
        **_MEASURES,
        "surface": f"{options.surface}: {_SURFACES[options.surface]}; distances follow the voxel spacing "
        "along axes at right angles.",
        "nsd": f"Share of both surfaces that lies within {tolerance} of the other one.",
        **{name: _EXTRA[name] for name in options.extra},
        **_SUMMARIES,
    }
    if groups:
        texts["groups"] = (
            "Cases of one patient are drawn together: intervals are those of patients, not of scans. In summary.json a "
            "patient is called as the first of the cases."
        )
        texts["cases_needed"] = (
            "How many patients like these, with as many cases each, a 95% interval of the mean Dice of ± 0.01, 0.02 or "
            "0.05 would take, from how far the means of patients spread; not given below three patients. Patients in "
            "whom the label has no Dice do not count."
        )
    if subgroups:
        texts["subgroups"] = (
            "The same measures over the cases with one value of the metadata. Bands include their lower edge and not "
            "their upper one. Below 10 cases (patients where they are known) a subgroup says little."
        )
    if options.lesion_rule is not None:
        texts["lesions"] = _lesions(options.lesion_rule)
    if options.probabilities is not None:
        texts["calibration"] = (
            "Expected calibration error: voxels are sorted into bins by their probability; the difference between mean "
            "probability and the share that is right, averaged over the bins by their voxels. 0 is best. Over the "
            "voxels of all cases together; of the strongest label first, then by label."
        )
    if options.ignore_value is not None:
        texts["ignore"] = f"Voxels where the reference is {options.ignore_value} belong to neither map."
    return texts


def _lesions(rule: LesionRule) -> str:
    contact = {1: "faces", 2: "faces or edges", 3: "faces, edges or corners"}[rule.connectivity]
    text = f"Rule {rule.name}: voxels that touch by {contact} are one lesion. "
    if rule.matching == "merged":
        text += (
            f"The reference is grown by {rule.dilation} voxels; what then hangs together is one lesion, and all "
            "predicted components that touch it are together its prediction. "
        )
    else:
        text += (
            f"A predicted and a reference lesion with an IoU above {rule.minimal_iou:g} can be a pair, each in one "
            "pair at most. "
        )
    if rule.minimal_mm3:
        text += f"Reference lesions of {rule.minimal_mm3:g} mm³ or less are not judged. "
    text += (
        "F1, sensitivity and precision count lesions over all cases. SQ: mean IoU of the pairs; RQ: F1; PQ: their "
        "product. Lesion Dice: mean over found, missed and spurious lesions, the last two with 0. "
    )
    if rule.unmatched_hd95_mm is not None:
        return text + f"Lesion HD95: missed and spurious lesions count with {rule.unmatched_hd95_mm:g} mm."
    return text + "Lesion HD95: mean over found lesions."
