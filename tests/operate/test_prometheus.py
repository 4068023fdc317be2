"""The dashboard and the alerts that the documentation offers, in a real Prometheus that reads a real server."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.watched import Watched, free_port

from lmcache_trio.testing.sides import CHUNK, Side, make_kv, wait_until

SHIPPED = Path(__file__).parents[2] / "docs" / "howto" / "operate"
ALERTS, DASHBOARD = SHIPPED / "alerts.yml", SHIPPED / "dashboard.json"
CASES = Path(__file__).with_name("alerts_test.yml")


def promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_when_it_should_and_is_silent_otherwise(tmp_path: Path) -> None:
    shutil.copy(ALERTS, tmp_path)
    (tmp_path / "cases.yml").write_text(CASES.read_text().replace("RULES", ALERTS.name))
    promtool("check", "rules", str(tmp_path / ALERTS.name))
    promtool("test", "rules", str(tmp_path / "cases.yml"))
    alerts = re.findall(r"alert: (\w+)", ALERTS.read_text())
    assert len(alerts) == len(set(alerts)) >= 7
    assert [alert for alert in alerts if alert not in CASES.read_text()] == []


class Prometheus:
    """A Prometheus of its own, which reads the server at *target* each second and has the alerts."""

    def __init__(self, where: Path, target: str) -> None:
        scrape = {"job_name": "lmcache-trio", "static_configs": [{"targets": [target]}]}
        config = {"global": {"scrape_interval": "1s", "evaluation_interval": "1s"}, "rule_files": [str(ALERTS)]}
        (where / "prometheus.yml").write_text(json.dumps({**config, "scrape_configs": [scrape]}))  # JSON is YAML
        place = f"127.0.0.1:{free_port()}"
        self.url = f"http://{place}"
        command = ["prometheus", f"--config.file={where}/prometheus.yml", f"--storage.tsdb.path={where}/data"]
        with (where / "prometheus.log").open("wb") as log:
            self.process = subprocess.Popen([*command, f"--web.listen-address={place}"], stderr=log, stdout=log)

    def query(self, expression: str) -> list[dict[str, Any]]:
        found = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, trust_env=False, timeout=60)
        assert found.status_code == 200, f"{expression}: {found.text}"
        result: list[dict[str, Any]] = found.json()["data"]["result"]
        return result

    def has(self, expression: str) -> bool:
        try:
            return bool(self.query(expression))
        except httpx.TransportError:
            return False  # it does not listen yet

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    made = Watched(tmp_path)
    yield made
    made.server.end()


@pytest.fixture
def prometheus(tmp_path: Path, watched: Watched) -> Iterator[Prometheus]:
    made = Prometheus(tmp_path, watched.url.removeprefix("http://"))
    yield made
    made.close()


def queries() -> Iterator[tuple[str, str]]:
    """Title of the panel and expression, of every query of the dashboard."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$instance", ".*")


def test_every_query_of_the_dashboard_and_of_the_alerts_is_answered(watched: Watched, prometheus: Prometheus) -> None:
    side = Side(watched.server.address, make_kv(seed=1))
    try:
        side.wait_healthy()
        wait_until(lambda: prometheus.has('up{job="lmcache-trio"} == 1'))
        side.check_round_trip("a prompt", list(range(3 * CHUNK)), list(range(12)), list(range(16, 28)))
        side.lookup("another prompt", list(range(1000, 1000 + CHUNK)))
        wait_until(lambda: prometheus.has("lmcache_trio_missed_tokens_total > 0"))
        wait_until(lambda: prometheus.has("count_over_time(lmcache_trio_lookups_total[5m]) >= 3"))
        asked = list(queries())
        assert len(asked) >= 18
        empty = [(title, query) for title, query in asked if " > 0" not in query and not prometheus.query(query)]
        assert empty == []
        for expression in re.findall(r"expr: (?!>)(.+)", ALERTS.read_text()):
            prometheus.query(expression)
        names = {rule["name"] for group in rules(prometheus) for rule in group["rules"] if rule["health"] == "ok"}
        assert names == set(re.findall(r"alert: (\w+)", ALERTS.read_text()))
        hit = prometheus.query("sum(lmcache_trio_hit_tokens_total) / sum(lmcache_trio_requested_tokens_total)")
        assert float(hit[0]["value"][1]) == 0.75  # 192 tokens of 256
    finally:
        side.close()


def rules(prometheus: Prometheus) -> list[dict[str, Any]]:
    """The groups of rules as Prometheus evaluates them, once it has."""
    found: list[dict[str, Any]] = []

    def evaluated() -> bool:
        found[:] = httpx.get(f"{prometheus.url}/api/v1/rules", trust_env=False, timeout=60).json()["data"]["groups"]
        return all(rule["health"] != "unknown" for group in found for rule in group["rules"])

    wait_until(evaluated)
    return found
