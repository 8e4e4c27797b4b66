"""The table of groups: whatever the groups are called, every parameter stands in it once."""

import pytest
import torch
from torch import nn

from hf_sai import SGDSaI, param_groups
from hf_sai.groups.table import describe_groups


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("names", [("heads", "heads"), ("1", None), (None, None)])
def test_groups_of_one_name_share_a_line_and_lose_no_parameter(names, trained):
    params = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(5))]
    groups = [
        {"params": [(f"p{i}", p)], "weight_decay": decay} | ({} if name is None else {"name": name})
        for i, (p, name, decay) in enumerate(zip(params, names, (0.1, 0.0), strict=True))
    ]
    optimizer = SGDSaI(groups)
    if trained:
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    lines = describe_groups(optimizer).splitlines()
    total = lines[-1].split()
    assert total[:3] == ["total", "2", "11"]
    shown = {line.split()[0]: line for line in lines[1:-1]}
    assert len(shown) == len({name or str(i) for i, name in enumerate(names)})
    if names[0] == names[1] == "heads":
        assert "2x3, 5" in shown["heads"]
        assert "yes, no" in shown["heads"]


def test_a_notebook_shows_groups_and_reports_as_tables():
    groups = param_groups(nn.Linear(3, 2), lr=0.01, weight_decay=0.1)
    shown = describe_groups(groups)._repr_html_()
    assert shown.startswith("<table><tr><th>group</th><th>role</th>")
    assert "<td>base/decay</td><td>base</td><td>1</td><td>6</td>" in shown
    optimizer = SGDSaI([("a<b", nn.Parameter(torch.ones(2)))])
    report = optimizer.gsnr_report()._repr_html_()
    assert "<td>a&lt;b</td>" in report
    assert report.endswith("</table><p>0 of 1 parameters measured</p>")


def test_a_table_in_a_notebook_names_who_is_unmeasured():
    optimizer = SGDSaI(param_groups(nn.Linear(3, 2), lr=0.01, weight_decay=0.1))
    weight = optimizer.param_groups[0]["params"][0]
    weight.grad = torch.randn(2, 3)
    optimizer.step()
    assert "not being trained (1): bias</p>" in describe_groups(optimizer)._repr_html_()
