"""Words that tables of hospitals use for the manifest's columns and values, in English, German, French and Spanish."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from vitmodel.data.tables import UNKNOWN_WORDS
from vitmodel.pixels import side_and_view
from vitmodel.pixels.side_and_view import fold

COLUMN_SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "path": (
        *("image_path", "file_path", "full_path", "file", "filename", "image_file", "image_file_path", "image"),
        *("datei", "dateiname", "dateipfad", "pfad", "bilddatei", "bild"),
        *("fichier", "chemin", "archivo", "fichero", "ruta", "imagen"),
    ),
    "patient_id": (
        *("patient", "pat_id", "pid", "subject_id", "subject", "mrn", "patient_number", "client_id"),
        *("patienten_id", "patientennummer", "patientennr", "patientin", "pat_nr", "id_patient", "patiente"),
        *("numero_patient", "paciente", "id_paciente", "paciente_id"),
    ),
    "image_id": ("sop_instance_uid", "instance_uid", "bild_id", "id_image", "id_imagen"),
    "exam_id": (
        *("study_id", "study_instance_uid", "study_uid", "exam", "accession_number", "accession", "acc_anon"),
        *("untersuchung", "untersuchungsnummer", "untersuchungs_id", "examen", "id_examen", "estudio", "id_estudio"),
    ),
    "laterality": (
        *("image_laterality", "side", "left_right", "left_or_right_breast", "breast_side", "breast", "lat"),
        *("seite", "lateralitaet", "lateralitat", "cote", "lateralite", "lado", "lateralidad"),
    ),
    "view": (
        *("view_position", "image_view", "projection", "ansicht", "projektion", "aufnahme"),
        *("incidence", "vue", "proyeccion", "vista"),
    ),
    "cancer": (
        *("diagnosis", "pathology", "malignant", "malignancy", "histology", "label", "target", "outcome"),
        *("classification", "diagnose", "pathologie", "histologie", "krebs", "karzinom", "boesartig", "dignitaet"),
        *("diagnostic", "maligne", "diagnostico", "patologia", "histologia", "maligno"),
    ),
    "birads": ("bi_rads", "birads_category", "birads_score", "bi_rads_category", "bi_rads_score", "assessment"),
    "density": (
        *("breast_density", "acr_density", "acr", "density_acr", "tissue_density", "breast_density_acr"),
        *("dichte", "brustdichte", "densite", "densite_mammaire", "densidad", "densidad_mamaria"),
    ),
    "age": ("patient_age", "patients_age", "age_at_study", "age_years", "alter", "edad"),
    "machine_id": ("machine", "manufacturer_model_name", "model_name", "device", "geraet", "appareil", "equipo"),
    "site_id": ("site", "hospital", "institution", "center", "centre", "klinik", "krankenhaus", "hopital", "centro"),
    "invasive": ("invasiv", "invasif", "invasivo"),
    "biopsy": ("biopsie", "biopsia"),
    "implant": ("implants", "implantat", "implante", "prothese"),
    "split": ("partition", "subset"),
}
"""Column of the manifest -> names that mean it; of several in one table, the first is taken."""

UNKNOWN = frozenset(
    ("", "unknown", "-", "--", "?", "unbekannt", "k.a.", "inconnu", "desconocido", *map(fold, UNKNOWN_WORDS))
)
"""Folded words for an unknown value."""
POSITIVE = frozenset(
    (
        *("1", "1.0", "true", "t", "yes", "y", "positive", "pos", "malignant", "malign", "cancer", "carcinoma"),
        *("ja", "j", "wahr", "positiv", "bosartig", "boesartig", "maligne", "krebs", "karzinom"),
        *("oui", "vrai", "positif", "malin", "si", "s", "verdadero", "positivo", "maligno", "maligna"),
    )
)
NEGATIVE = frozenset(
    (
        *("0", "0.0", "false", "f", "no", "n", "negative", "neg", "benign", "normal", "healthy"),
        *("benign_without_callback", "benign without callback"),
        *("nein", "falsch", "negativ", "gutartig", "benigne", "gesund", "unauffallig", "unauffaellig"),
        *("non", "faux", "negatif", "benin", "sain", "falso", "negativo", "benigno", "benigna", "sano"),
    )
)
DENSITY = re.compile(r"(?:(?:acr|type|typ|density|birads|bi-rads|category)[\s_-]*)?([a-d1-4]|iv|i{1,3})", re.IGNORECASE)
DENSITY_LETTERS = {"1": "A", "2": "B", "3": "C", "4": "D", "I": "A", "II": "B", "III": "C", "IV": "D"}
BIRADS = re.compile(r"(?:(?:bi-?rads|category|kategorie)[\s_:-]*)?([0-6])\s?(?:[abc]|\.0)?", re.IGNORECASE)
AGE = re.compile(r"0*(\d{1,3}(?:\.\d+)?)\s?y?", re.IGNORECASE)


def column_key(name: str) -> str:
    """Return a column's name without case, accents, spaces and punctuation, to compare names."""
    return re.sub(r"[^a-z0-9]", "", fold(name))


def read_side(text: str) -> str | None:
    """Return L, R, or None if the word is not known."""
    return side_and_view.read_side(text) or None


def read_flag(text: str) -> str | None:
    """Return 1, 0, or None if the word is not known."""
    word = fold(text)
    return "1" if word in POSITIVE else "0" if word in NEGATIVE else None


def read_view(text: str) -> str | None:
    """Return the view, without a side in front of it; other text in capitals."""
    return side_and_view.find_side_and_view(text).view or text.strip().upper()


def read_density(text: str) -> str | None:
    """Return A, B, C or D for a letter or a number from 1 to 4, or None for other text."""
    match = DENSITY.fullmatch(text.strip().removesuffix(".0"))
    return DENSITY_LETTERS.get(match[1].upper(), match[1].upper()) if match else None


def read_birads(text: str) -> str | None:
    """Return the category without its letter, or None for other text."""
    match = BIRADS.fullmatch(text.strip())
    return match[1] if match else None


def read_age(text: str) -> str | None:
    """Return the age in years; 61,5 is 61.5, and 061Y (the form of DICOM) is 61."""
    match = AGE.fullmatch(text.strip().replace(",", "."))
    return match[1] if match else None


VALUE_READERS: Mapping[str, tuple[Callable[[str], str | None], str]] = {
    "laterality": (read_side, "L or R (or left, right, links, rechts, gauche, droite, izquierda, derecha)"),
    "view": (read_view, "a view such as CC or MLO"),
    "cancer": (read_flag, "1 or 0 (or malignant, benign, normal, yes, no)"),
    "invasive": (read_flag, "1 or 0"),
    "biopsy": (read_flag, "1 or 0"),
    "implant": (read_flag, "1 or 0"),
    "difficult_negative_case": (read_flag, "1 or 0"),
    "density": (read_density, "A, B, C or D (or 1 to 4)"),
    "birads": (read_birads, "0 to 6 (4a, 4b and 4c are 4)"),
    "age": (read_age, "years"),
}
"""Column -> the function that reads a value, None if it cannot; and the allowed values in words."""
