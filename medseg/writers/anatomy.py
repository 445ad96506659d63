"""Names of labels → what they are in SNOMED CT; a name that is not here is an anatomical structure, no guess."""

from __future__ import annotations

import re
from dataclasses import dataclass

STRUCTURE, TISSUE, ABNORMAL = "91723000", "85756007", "49755003"
LEFT, RIGHT = "7771000", "24028007"

# the code of each meaning, as in the standard's context groups (pydicom's dictionary; a test compares them)
CODES: dict[str, str] = {
    "hippocampus": "5366008",
    "amygdala": "4958002",
    "thalamus": "42695009",
    "caudate nucleus": "11000004",
    "putamen": "89278009",
    "globus pallidus": "14738005",
    "brain stem": "119238007",
    "cerebellum": "113305005",
    "brain": "12738006",
    "white matter": "389080008",
    "gray matter": "389081007",
    "cerebrospinal fluid": "65216001",
    "lateral ventricle": "66720007",
    "third ventricle": "49841001",
    "fourth ventricle": "35918002",
    "corpus callosum": "88442005",
    "nucleus accumbens": "427667007",
    "cerebral cortex": "40146001",
    "cerebral white matter": "68523003",
    "skull": "89546000",
    "spinal cord": "2748008",
    "pituitary": "56329008",
    "optic nerve": "18234004",
    "optic chiasm": "244453006",
    "eye": "81745001",
    "lens": "78076003",
    "parotid gland": "45289007",
    "submandibular gland": "54019009",
    "lacrimal gland": "13561001",
    "mandible": "91609006",
    "tongue": "21974007",
    "larynx": "4596009",
    "pharynx": "54066008",
    "oral cavity": "74262004",
    "liver": "10200004",
    "spleen": "78961009",
    "kidney": "64033007",
    "pancreas": "15776009",
    "gallbladder": "28231008",
    "stomach": "69695003",
    "duodenum": "38848004",
    "small intestine": "30315005",
    "colon": "71854001",
    "rectum": "34402009",
    "anus": "53505006",
    "esophagus": "32849002",
    "trachea": "44567001",
    "bronchus": "955009",
    "thymus": "9875009",
    "diaphragm": "5798000",
    "lung": "39607008",
    "upper lobe of lung": "45653009",
    "middle lobe of right lung": "72481006",
    "lower lobe of lung": "90572001",
    "heart": "80891009",
    "left atrium": "82471001",
    "right atrium": "73829009",
    "left ventricle": "87878005",
    "right ventricle": "53085002",
    "pericardium": "76848001",
    "coronary artery": "41801008",
    "aorta": "15825003",
    "ascending aorta": "54247002",
    "aortic arch": "57034009",
    "inferior vena cava": "64131007",
    "superior vena cava": "48345005",
    "portal vein": "32764006",
    "hepatic vein": "8993003",
    "pulmonary artery": "81040000",
    "pulmonary vein": "122972007",
    "carotid artery": "69105007",
    "common carotid artery": "32062004",
    "subclavian artery": "36765005",
    "brachiocephalic vein": "8887007",
    "brachiocephalic trunk": "12691009",
    "iliac artery": "10293006",
    "common iliac artery": "73634005",
    "common iliac vein": "46027005",
    "adrenal gland": "23451007",
    "thyroid": "69748006",
    "prostate": "41216001",
    "seminal vesicle": "64739004",
    "bladder": "89837001",
    "uterus": "35039007",
    "ovary": "15497006",
    "testis": "40689003",
    "breast": "76752008",
    "femur": "71341001",
    "hip": "29836001",
    "tibia": "12611008",
    "fibula": "87342007",
    "patella": "64234005",
    "meniscus": "74135004",
    "sacrum": "54735007",
    "vertebra": "51282000",
    "scapula": "79601000",
    "clavicle": "51299004",
    "humerus": "85050009",
    "ulna": "23416004",
    "rib": "113197003",
    "sternum": "56873002",
    "costal cartilage": "50016007",
    "hyoid bone": "21387005",
    "face": "89545001",
    "lymph node": "59441001",
    "brachial plexus": "36582005",
    "nerve": "91728009",
    "pancreatic duct": "69930009",
    "bile duct": "28273000",
    "retina": "5665001",
    "skin": "39937001",
    "tooth": "38199008",
    "c1 vertebra": "14806007",
    "c2 vertebra": "39976000",
    "c3 vertebra": "113205007",
    "c4 vertebra": "5329002",
    "c5 vertebra": "36978003",
    "c6 vertebra": "36054005",
    "c7 vertebra": "87391001",
    "t1 vertebra": "64864005",
    "t2 vertebra": "53733008",
    "t3 vertebra": "1626008",
    "t4 vertebra": "73071006",
    "t5 vertebra": "56401006",
    "t6 vertebra": "45296009",
    "t7 vertebra": "62487009",
    "t8 vertebra": "11068009",
    "t9 vertebra": "82687006",
    "t10 vertebra": "7610001",
    "t11 vertebra": "12989004",
    "t12 vertebra": "23215003",
    "l1 vertebra": "66794005",
    "l2 vertebra": "14293000",
    "l3 vertebra": "36470004",
    "l4 vertebra": "11994002",
    "l5 vertebra": "49668003",
    "artery": "51114001",
    "blood vessel": "59820001",
    "vein": "29092000",
    "bone": "272673000",
    "muscle": "71616004",
    "neoplasm": "108369006",
    "lesion": "52988006",
    "mass": "4147007",
    "nodule": "27925004",
    "edema": "79654002",
    "necrosis": "6574001",
    "cyst": "367643001",
    "hemorrhage": "50960005",
    "hematoma": "35566002",
    "anatomical structure": STRUCTURE,
    "tissue": TISSUE,
    "morphologically abnormal structure": ABNORMAL,
    "left": LEFT,
    "right": RIGHT,
}

_ABNORMAL = frozenset(("neoplasm", "lesion", "mass", "nodule", "edema", "necrosis", "cyst", "hemorrhage", "hematoma"))
_TISSUE = frozenset(("white matter", "gray matter", "cerebral white matter", "cerebrospinal fluid"))

# what data sets say instead
_ALIASES = {
    "oesophagus": "esophagus",
    "brainstem": "brain stem",
    "grey matter": "gray matter",
    "csf": "cerebrospinal fluid",
    "caudate": "caudate nucleus",
    "pallidum": "globus pallidus",
    "accumbens": "nucleus accumbens",
    "adrenal": "adrenal gland",
    "parotid": "parotid gland",
    "submandibular": "submandibular gland",
    "thyroid gland": "thyroid",
    "pituitary gland": "pituitary",
    "optic chiasma": "optic chiasm",
    "gall bladder": "gallbladder",
    "urinary bladder": "bladder",
    "small bowel": "small intestine",
    "lung upper lobe": "upper lobe of lung",
    "lung middle lobe": "middle lobe of right lung",
    "lung lower lobe": "lower lobe of lung",
    "clavicula": "clavicle",
    "iliac vena": "common iliac vein",
    "hipbone": "hip",
    "vessel": "blood vessel",
    "tumor": "neoplasm",
    "tumour": "neoplasm",
    "cancer": "neoplasm",
    "oedema": "edema",
    "haemorrhage": "hemorrhage",
    "heart atrium left": "left atrium",
    "heart atrium right": "right atrium",
    "heart ventricle left": "left ventricle",
    "heart ventricle right": "right ventricle",
    "postcava": "inferior vena cava",
}
# these names say a side of the heart or lung that belongs to the meaning itself
_SIDED = frozenset(("left atrium", "right atrium", "left ventricle", "right ventricle", "middle lobe of right lung"))


@dataclass(frozen=True)
class Anatomy:
    """Category, type and side (empty: not told) of a segment, each as a meaning that `CODES` holds."""

    category: str
    meaning: str
    side: str = ""


def anatomy_of(name: str) -> Anatomy:
    """What the name of a label says: `kidney_left`, `Left Kidney` and `kidney l` are one thing."""
    words = [word for word in re.split(r"[\W_]+", name.lower()) if word]
    # vertebrae_L1 is not on the left
    spine = re.fullmatch(r"vertebrae? ([ctl]\d{1,2})", " ".join(words))
    if spine and f"{spine[1]} vertebra" in CODES:
        return Anatomy("anatomical structure", f"{spine[1]} vertebra")
    # nor is a rib's number a part of what it is
    words = [word for word in words if "rib" not in words or not word.isdigit()]
    whole = _meaning(words)
    if whole in _SIDED:
        return Anatomy(_category(whole), whole)
    sides = {"left": "left", "l": "left", "right": "right", "r": "right"}
    found = {sides[word] for word in words if word in sides}
    rest = [word for word in words if word not in sides]
    meaning = _meaning(rest)
    side = found.pop() if len(found) == 1 else ""
    if not meaning:
        # the abnormal one of a compound: `liver_tumor`, `kidney cyst`
        meaning = next((m for m in map(_meaning, ([word] for word in rest)) if m in _ABNORMAL), "")
    if not meaning:
        return Anatomy("anatomical structure", "anatomical structure", side)
    return Anatomy(_category(meaning), meaning, "" if meaning in _SIDED else side)


def _meaning(words: list[str]) -> str:
    text = " ".join(words)
    for candidate in (text, text[:-1] if text.endswith("s") else text):
        known = _ALIASES.get(candidate, candidate)
        if known in CODES and CODES[known] not in (STRUCTURE, TISSUE, ABNORMAL, LEFT, RIGHT):
            return known
    return ""


def _category(meaning: str) -> str:
    if meaning in _ABNORMAL:
        return "morphologically abnormal structure"
    return "tissue" if meaning in _TISSUE else "anatomical structure"
