"""From a git ref to a release: built, tested, trained, judged, compiled, published."""

from __future__ import annotations

from datetime import date

from prefect import flow

from perennial.releases import content_id, draft_release
from perennial.values import ProjectName, Release
from tasks import edge
from tasks.data import snapshot_data, validate_data
from tasks.model import check_gates, compile_model, evaluate_model, run_project_tests, train_model
from tasks.release import publish_package, register_model, rejected, write_release
from tasks.source import check_out, make_environment, validate_contract


@flow(flow_run_name=edge.named("build {project}", "at {ref}", "for {as_of}"), **edge.DURABLE)
@edge.explained
def build(project: ProjectName, ref: str | None = None, as_of: date | None = None) -> Release:
    """Build `project` at a git ref (its branch without one) on the data known on a day (today without one).

    Ends in a `Release`, or in the state `Rejected` naming the gate that was not passed.
    """
    code = check_out(project, ref)
    contract = validate_contract(code)
    environment = make_environment(code)
    dataset = snapshot_data(code, contract, environment, as_of)
    validate_data(code, contract, dataset)
    tests = run_project_tests(code, contract, environment)
    model = train_model(code, contract, environment, dataset)
    evaluation = evaluate_model(contract, dataset, model)
    release_id = content_id(code=code, environment=environment, dataset=dataset, model=model)
    gates = check_gates(contract, evaluation, release_id)
    draft = draft_release(
        code=code,
        contract=contract,
        environment=environment,
        dataset=dataset,
        tests=tests,
        model=model,
        evaluation=evaluation,
        gates=gates,
    )
    if not gates.passed:
        return rejected(write_release(draft))
    serving = compile_model(code, contract, environment, dataset, model)
    package = publish_package(code, contract)
    registered = register_model(draft, serving, package)
    return write_release(registered)
