"""The cluster's files: valid by Kubernetes' schemas, and true to what the server and the images are.

No cluster has run them. The schemas of Kubernetes itself come with the package kubernetes-validate. Those of two kinds
from other projects are written down here: the fields that are used, from what these projects have published.
"""

import copy
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from guanaco.server.api.http.auth import OPEN_PATHS
from guanaco.server.config import Settings

FOLDER = Path(__file__).parent.parent / "docker/kubernetes"
KUBERNETES = "1.34"


def _documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def _object(required: str = "", **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": required.split(),
        "properties": properties,
        "additionalProperties": False,
    }


_NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 253}
_LABELS = _object("matchLabels", matchLabels={"type": "object", "additionalProperties": {"type": "string"}})
_PORT = _object("number", number={"type": "integer", "minimum": 1, "maximum": 65535})
_FOREIGN = {
    "InferencePool": _object(
        "apiVersion kind metadata spec",
        apiVersion={"const": "inference.networking.k8s.io/v1"},
        kind={"const": "InferencePool"},
        metadata=_object("name", name=_NAME),
        spec=_object(
            "selector targetPorts endpointPickerRef",
            selector=_LABELS,
            targetPorts={"type": "array", "minItems": 1, "maxItems": 8, "items": _PORT},
            endpointPickerRef=_object(
                "name",
                group={"type": "string"},
                kind={"type": "string"},
                name=_NAME,
                port=_PORT,
                failureMode={"enum": ["FailOpen", "FailClose"]},
            ),
        ),
    ),
    "PodMonitor": _object(
        "apiVersion kind metadata spec",
        apiVersion={"const": "monitoring.coreos.com/v1"},
        kind={"const": "PodMonitor"},
        metadata=_object("name", name=_NAME),
        spec=_object(
            "selector podMetricsEndpoints",
            selector=_LABELS,
            podMetricsEndpoints={
                "type": "array",
                "items": _object(
                    "port",
                    port={"type": "string"},
                    path={"type": "string"},
                    interval={"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"},
                    authorization=_object(
                        "credentials",
                        type={"type": "string"},
                        credentials=_object("key", name=_NAME, key={"type": "string"}),
                    ),
                ),
            },
        ),
    ),
}
ALL = [
    pytest.param(document, id=f"{document['kind']}-{document['metadata']['name']}")
    for path in sorted(FOLDER.glob("*.yaml"))
    for document in _documents(path.name)
    if "kind" in document and document["kind"] != "Kustomization"
]
DEPLOYMENT = _documents("deployment.yaml")[0]
POD = DEPLOYMENT["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]


def _check(document: dict[str, Any]) -> None:
    if schema := _FOREIGN.get(document["kind"]):
        jsonschema.validate(document, schema)
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("document", ALL)
def test_every_object_is_valid(document: dict[str, Any]) -> None:
    _check(document)
    wrong = copy.deepcopy(document)
    wrong["spec"]["selectors"] = {}
    with pytest.raises((kubernetes_validate.ValidationError, jsonschema.ValidationError)):
        _check(wrong)


def test_the_folder_is_what_kustomize_is_told() -> None:
    (kustomization,) = _documents("kustomization.yaml")
    text = (FOLDER / "kustomization.yaml").read_text()
    assert set(kustomization) == {"apiVersion", "kind", "labels", "resources", "images"}
    assert set(kustomization["resources"]) == {"deployment.yaml", "service.yaml", "storage.yaml"}
    others = {path.name for path in FOLDER.glob("*.yaml")} - set(kustomization["resources"]) - {"kustomization.yaml"}
    assert others == {"podmonitor.yaml", "inferencepool.yaml", "picker-values.yaml"}
    assert all(name in text for name in others)
    assert kustomization["images"][0]["name"] == CONTAINER["image"]
    assert "includeSelectors" not in text, "labels that are added must not change the selectors"


def test_no_service_is_called_like_the_settings() -> None:
    """Its variables (GUANACO_PORT=tcp://…) would be set in every pod."""
    services = [document["metadata"]["name"] for document in _documents("service.yaml")]
    assert services
    assert not [name for name in services if name.startswith("guanaco")]
    assert POD["spec"]["enableServiceLinks"] is False


def test_names_that_belong_together_are_the_same() -> None:
    labels, port = POD["metadata"]["labels"], CONTAINER["ports"][0]
    (service,), (pool,), (monitor,) = (
        _documents(name) for name in ("service.yaml", "inferencepool.yaml", "podmonitor.yaml")
    )
    values = _documents("picker-values.yaml")[0]
    selectors = [
        DEPLOYMENT["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        pool["spec"]["selector"]["matchLabels"],
        monitor["spec"]["selector"]["matchLabels"],
        values["inferencePool"]["modelServers"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == port["name"]
    assert [target["number"] for target in pool["spec"]["targetPorts"]] == [port["containerPort"]] == [Settings().port]
    assert pool["spec"]["endpointPickerRef"]["name"] == f"{pool['metadata']['name']}-epp"
    claims = {document["metadata"]["name"] for document in _documents("storage.yaml")}
    volumes = {volume["name"]: volume for volume in POD["spec"]["volumes"]}
    used = {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v}
    assert claims == used
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == volumes.keys()
    assert endpoint["authorization"]["credentials"]["name"] == volumes["keys"]["secret"]["secretName"]


def test_the_server_gets_settings_probes_and_time_that_it_knows() -> None:
    variables = {entry["name"]: entry["value"] for entry in CONTAINER["env"]}
    settings = {name.removeprefix("GUANACO_").lower(): value for name, value in variables.items()}
    assert settings.keys() <= Settings.model_fields.keys()
    own = Settings.model_validate(settings)
    assert POD["spec"]["terminationGracePeriodSeconds"] > own.drain_delay + own.drain_timeout
    probes = {kind: CONTAINER[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}
    paths = {kind: probe["httpGet"]["path"] for kind, probe in probes.items()}
    assert paths == {"startup": "/health/ready", "readiness": "/health/ready", "liveness": "/health/live"}
    assert set(paths.values()) <= OPEN_PATHS
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] >= 600, "ten minutes to start"
    assert own.drain_delay > probes["readiness"]["periodSeconds"] * probes["readiness"]["failureThreshold"]


def test_the_pod_has_no_rights() -> None:
    pod, own = POD["spec"]["securityContext"], CONTAINER["securityContext"]
    assert (pod["runAsNonRoot"], pod["runAsUser"], pod["runAsGroup"]) == (True, 2000, 0)
    assert own["readOnlyRootFilesystem"] is True
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert POD["spec"]["automountServiceAccountToken"] is False


def test_the_picker_uses_plugins_that_it_is_told_of() -> None:
    extension = _documents("picker-values.yaml")[0]["inferenceExtension"]
    config = yaml.safe_load(extension["pluginsCustomConfig"][extension["pluginsConfigFile"]])
    declared = [plugin["type"] for plugin in config["plugins"]]
    (profile,) = config["schedulingProfiles"]
    assert [plugin["pluginRef"] for plugin in profile["plugins"]] == declared
    weights = {plugin["pluginRef"]: plugin.get("weight", 0) for plugin in profile["plugins"]}
    assert max(weights, key=weights.__getitem__) == "lora-affinity-scorer"
