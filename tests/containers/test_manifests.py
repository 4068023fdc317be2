"""The manifests of docs/howto/kubernetes: what Kubernetes takes (its JSON schemas, which `kubernetes-validate` has),
and what lmcache-trio does.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache_trio import load_config
from lmcache_trio.adapters.vllm.settings import parse_settings

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="it is in the dependency group `manifests`")
yaml = pytest.importorskip("yaml")

PLACE = Path(__file__).parents[2] / "docs" / "howto" / "kubernetes"
MANIFESTS = sorted(PLACE.glob("*.yaml"))


def _containers(part: Any) -> Iterator[Any]:
    """Every container in *part* of a manifest."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key in ("containers", "initContainers"):
                yield from value
            else:
                yield from _containers(value)


def test_there_is_a_sidecar_and_a_daemon_set() -> None:
    assert [path.name for path in MANIFESTS] == ["daemonset.yaml", "sidecar.yaml"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_is_one_that_kubernetes_takes(path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text()))
    for document in documents:
        kubernetes_validate.validate(document, "1.33", strict=True)
    wrong = json.loads(json.dumps(documents[0]))
    next(_containers(wrong["spec"].get("template", wrong)["spec"]))["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.33", strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_gives_settings_that_there_are_and_one_address_in_the_shared_volume(path: Path) -> None:
    addresses, servers = set(), 0
    for document in yaml.safe_load_all(path.read_text()):
        for container in _containers(document):
            (mount,) = container["volumeMounts"]
            arguments = container["args"]
            if container["name"] == "cache":
                sets = arguments[arguments.index("--set") + 1 :]
                config = load_config(sets=sets, environ={})
                address, servers = config.address, servers + 1
                assert "runAsUser" not in container["securityContext"] or config.access.uids == (1000,)
            else:
                transfer = json.loads(arguments[arguments.index("--kv-transfer-config") + 1])
                address = parse_settings(transfer["kv_connector_extra_config"], {}).address
            assert address.startswith(f"unix://{mount['mountPath']}/")
            addresses.add(address)
            text = json.dumps(document)
            assert not any(word in text for word in ("hostIPC", "hostPID", "shareProcessNamespace", "/dev/shm"))
    assert (len(addresses), servers) == (1, 1)
