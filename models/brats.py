"""Facts of the BraTS data sets: modalities, labels and regions, what the raw label values of each cohort mean, and
which cases are of one patient. Without numpy, so that the scripts can name the schemes in their help."""

import re
from pathlib import Path

MODALITIES = ("t1", "t1ce", "t2", "flair")  # the channel order of every tensor, checkpoint and figure
LABELS = {1: "NCR", 2: "ED", 3: "ET"}  # training labels; 0 is background
LABEL_NAMES = {"NCR": "necrotic / non-enhancing core", "ED": "oedema", "ET": "enhancing tumour"}
REGIONS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
REGION_CHANNELS = ("TC", "WT", "ET")  # the order of a network's outputs where they are regions, not labels
TARGETS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,), "NCR": (1,), "ED": (2,)}  # what is scored, in table order

# Raw label -> training label. The meaning of a raw value is decided per data set, never by the values that are found:
# 4 is the enhancing tumour up to 2021, the resection cavity after treatment and oedema in children.
LABEL_SCHEMES = {
    "brats2021": {0: 0, 1: 1, 2: 2, 4: 3},
    "brats2023": {0: 0, 1: 1, 2: 2, 3: 3},
    "brats2024": {0: 0, 1: 1, 2: 2, 3: 3, 4: 0},  # the resection cavity is not tumour
    "brats-ped": {0: 0, 1: 3, 2: 1, 3: 1, 4: 2},  # the tumour core of BraTS-PED is 1 + 2 + 3
    "msd": {0: 0, 1: 2, 2: 1, 3: 3},
}
SCHEME_USERS = {
    "brats2021": "BraTS 2017-2021, UPENN-GBM and UCSF-PDGM",
    "brats2023": "BraTS 2023 on: GLI before treatment, GoAT, MEN, SSA, and PED as released in 2023",
    "brats2024": "BraTS 2024 on: GLI after treatment, MET",
    "brats-ped": "BraTS-PED as released from 2024 on",
    "msd": "MSD Task01, and BraTS as nnU-Net converts it",
}
RAW_NAMES = {  # where the training label alone does not say what a raw value is
    ("brats2024", 4): "resection cavity",
    ("brats-ped", 2): "non-enhancing",
    ("brats-ped", 3): "cyst",
}

# What follows "BraTS-" in a case name -> its labels, as the evaluation of the challenges defines them.
COHORTS = {
    "GLI": "brats2023",  # visits from 100 on are after treatment: brats2024
    "GoAT": "brats2023",
    "MEN": "brats2023",
    "MET": "brats2024",  # the release of 2023 has the same values, but no resection cavity
    "PED": "brats-ped",  # the release of 2023 has other values under the same names, in folders with the year
    "SSA": "brats2023",
}
COHORT_NAME = re.compile(r".*BraTS[-_](?P<cohort>[a-z]+(?:[-_][a-z]+)*)[-_]\d+(?:[-_](?P<visit>\d+))?", re.I)
# ASNR-MICCAI-BraTS2023-PED-Challenge-TrainingData, BraTS-PEDs2024_Training
RELEASE = re.compile(r"(?:BraTS|PEDs?)[-_ ]?(?:PEDs?[-_ ]?)?(20\d\d)(?!\d)", re.I)
FIRST_VISIT_AFTER_TREATMENT = 100

# Names in which a visit follows the patient.
VISITS = (
    re.compile(r"(BraTS[-_][a-z_-]+[-_]\d{4,5})[-_]\d{1,3}", re.I),
    re.compile(r"(Brats1[789]_.+)_\d+", re.I),
    re.compile(r"(UPENN-GBM-\d{5})_\d{2}", re.I),
    re.compile(r"(sub-[a-z0-9]+)_.+", re.I),  # BIDS: sub-01_ses-2
    re.compile(r"(.+?)[-_](?:FU|timepoint|visit|week)[-_]?\d+[a-z]?(?:-\d)?(?:[-_][a-z]+)*", re.I),
)


def patient_of(name: str) -> str:
    """What the visits of one patient share; a case whose name has no visit is a patient of its own. The gliomas of
    2023 are those of 2021 under new names with the same numbers."""
    if glioma := re.fullmatch(r"BraTS2021_(\d{5})", name, re.I):
        return f"BraTS-GLI-{glioma[1]}"
    return next((match[1] for pattern in VISITS if (match := pattern.fullmatch(name))), name)


# ---- what raw label values mean ------------------------------------------------------------------------------------


def cohort_of(name: str) -> str:
    """The cohort in a case name: GLI of BraTS-GLI-00001-000; "" where there is none. It need not be one of COHORTS."""
    match = COHORT_NAME.match(name)
    found = match["cohort"].upper().replace("_", "-") if match else ""
    return next((known for known in COHORTS if known.upper() == found), found)


def cohort_scheme(name: str, path: Path) -> str:
    """The label scheme of the cohort in a case name; "" where that has none. `path` is a file of the case: the nearest
    folder above it that names a year tells the pediatric release of 2023 from the later ones."""
    cohort = cohort_of(name)
    if cohort == "GLI" and int(COHORT_NAME.match(name)["visit"] or 0) >= FIRST_VISIT_AFTER_TREATMENT:
        return "brats2024"
    years = (match[1] for part in reversed(path.absolute().parts) if (match := RELEASE.search(part)))
    if cohort == "PED" and next(years, None) == "2023":
        return "brats2023"
    return COHORTS.get(cohort, "")


def describe_scheme(scheme: str) -> str:
    """1 = NCR, 2 = ED, and so on: what the raw values of a scheme become."""
    names = {0: "background", **LABELS}
    return ", ".join(
        f"{raw} = {names[training]}" + (f" ({RAW_NAMES[scheme, raw]})" if (scheme, raw) in RAW_NAMES else "")
        for raw, training in LABEL_SCHEMES[scheme].items()
        if raw
    )


def list_schemes() -> str:
    """Every scheme and what its values become, in one line."""
    return "; ".join(f"{scheme} ({describe_scheme(scheme)})" for scheme in LABEL_SCHEMES)
