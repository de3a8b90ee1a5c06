from pathlib import Path

from services.stack.plan import Plan, new_metrics_ports
from services.stack.state import StateDirectory


def test_several_routers_share_the_port_and_have_a_metrics_page_each(tmp_path: Path) -> None:
    ports = new_metrics_ports(routers=3)
    plan = Plan(StateDirectory(tmp_path), tmp_path, routers=3, metrics_ports=ports)
    *_, router = plan.services()
    assert router.name == "router"
    assert router.command[-2:] == ("--processes", "3")
    pages = {name: page for name, page in plan.metrics_pages.items() if "router" in name}
    assert pages == {
        "router": f"http://127.0.0.1:{ports['router']}/metrics",
        "router-1": f"http://127.0.0.1:{ports['router'] + 1}/metrics",
        "router-2": f"http://127.0.0.1:{ports['router'] + 2}/metrics",
    }
    *_, alone = Plan(StateDirectory(tmp_path), tmp_path).services()
    assert "--processes" not in alone.command
