"""The scores of a job as a FHIR R4 DiagnosticReport."""

from __future__ import annotations

import json
from typing import Any

from vitmodel.node.models import Job, Study
from vitmodel.utils import NOT_A_MEDICAL_DEVICE

SIDES = {
    "L": {"system": "http://snomed.info/sct", "code": "80248007", "display": "Left breast structure"},
    "R": {"system": "http://snomed.info/sct", "code": "73056007", "display": "Right breast structure"},
}


def diagnostic_report(job: Job, study: Study) -> dict[str, Any]:
    """Return the report of a scored job (https://hl7.org/fhir/R4/diagnosticreport.html).

    Its status is `preliminary`: no person has read it. Breasts without a score are left out.
    """
    breasts = json.loads(job.scores)["breasts"] if job.scores else []
    scored = [breast for breast in breasts if breast["probability"] is not None]
    observations = [_observation(breast, number) for number, breast in enumerate(scored)]
    report: dict[str, Any] = {
        "resourceType": "DiagnosticReport",
        "id": str(job.id),
        "status": "preliminary",
        "category": [{"coding": [{"system": "http://terminology.hl7.org/CodeSystem/v2-0074", "code": "RAD"}]}],
        "code": {"coding": [{"system": "http://loinc.org", "code": "24606-6"}], "text": "Mammography"},
        "identifier": [{"system": "urn:dicom:uid", "value": f"urn:oid:{study.study_uid}"}],
        "contained": observations,
        "result": [{"reference": f"#{observation['id']}"} for observation in observations],
        "conclusion": f"Computed by vitmodel {job.software} without a reader. {NOT_A_MEDICAL_DEVICE}",
    }
    if study.patient_id:
        report["subject"] = {"identifier": {"value": study.patient_id}}
    if len(study.study_date) == 8:
        date = study.study_date
        report["effectiveDateTime"] = f"{date[:4]}-{date[4:6]}-{date[6:]}"
    return report


def _observation(breast: dict[str, Any], number: int) -> dict[str, Any]:
    percent = {"unit": "%", "system": "http://unitsofmeasure.org", "code": "%"}
    observation: dict[str, Any] = {
        "resourceType": "Observation",
        "id": f"breast-{number}",
        "status": "preliminary",
        "code": {
            "coding": [{"system": "http://dicom.nema.org/resources/ontology/DCM", "code": "111047"}],
            "text": "Probability of cancer",
        },
        "valueQuantity": {"value": round(100 * breast["probability"], 4), **percent},
        "note": [{"text": NOT_A_MEDICAL_DEVICE}],
    }
    if breast["laterality"] in SIDES:
        observation["bodySite"] = {"coding": [SIDES[breast["laterality"]]]}
    return observation
