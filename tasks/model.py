"""From a snapshot to a trained model, and to the verdict on it."""

from __future__ import annotations

from prefect import get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from perennial import artifacts, assessment, gates, reports, snapshot, training
from perennial.config import Project
from perennial.errors import ProjectError
from perennial.values import (
    Dataset,
    Evaluation,
    GateReport,
    ModelEnvironment,
    ReleaseId,
    ServingForm,
    Source,
    TestReport,
    TrainedModel,
    slug,
)
from tasks import edge


@task
def run_project_tests(code: Source, project: Project, environment: ModelEnvironment) -> TestReport:
    """The developer's own tests, in the model's environment; the report is kept, passed or failed."""
    folder = edge.project_folder(code)
    outcome = training.run_tests(
        project,
        folder,
        edge.environment_python(environment),
        edge.work_folder(),
        get_run_logger().info,
    )
    report = artifacts.put_file(edge.store(), f"reports/{project.name}/tests/tests.xml", outcome.report)
    create_markdown_artifact(
        key=f"tests-{slug(project.name)}",
        markdown=reports.tests_page(outcome.passed, outcome.failed, outcome.skipped, outcome.tail),
        description="What the developer's own tests said",
    )
    create_link_artifact(
        key=f"tests-report-{slug(project.name)}", link=edge.report_url(report.uri), link_text="tests.xml"
    )
    if outcome.failed:
        raise ProjectError(
            f"{len(outcome.failed)} of the project's tests failed: {', '.join(outcome.failed[:5])}",
            f"all to pass; the report is at {edge.report_url(report.uri)}",
        )
    return TestReport(passed=outcome.passed, skipped=outcome.skipped, report=report)


@task
def train_model(
    code: Source, project: Project, environment: ModelEnvironment, dataset: Dataset
) -> TrainedModel:
    """Train on all but the newest days in the project's environment, with its seed."""
    folder = edge.project_folder(code)
    progress = edge.Progress(f"training-{slug(project.name)}", "training", lines_expected=8)
    start, rows = snapshot.split(dataset, project.config)
    output, result = training.train(
        project,
        folder,
        edge.environment_python(environment),
        edge.snapshot_file(dataset),
        snapshot.features(dataset, project.config),
        start,
        rows,
        edge.work_folder(),
        progress.line,
    )
    model = assessment.keep_model(edge.store(), project, environment, start, output, result)
    progress.done()
    return model


@task
def evaluate_model(project: Project, dataset: Dataset, model: TrainedModel) -> Evaluation:
    """Metrics on the newest days, with intervals, per slice, and against the champion on the same rows."""
    store, work = edge.store(), edge.work_folder()
    holdout = assessment.read_holdout(store, project.config, model, work)
    champion = edge.champion(project)
    theirs = None
    if champion is not None:
        theirs = assessment.champion_predictions(
            project,
            edge.release_folder(champion),
            edge.environment_python(champion.environment),
            dataset,
            model,
            edge.snapshot_file(dataset),
            work,
        )
    evaluation = assessment.evaluate(project.config, holdout, champion, theirs)
    return assessment.keep_report(store, project, model, holdout, evaluation)


@task
def check_gates(project: Project, evaluation: Evaluation, release_id: ReleaseId) -> GateReport:
    """Good enough? Absolute thresholds, and not worse than the champion. Nothing is judged twice."""
    judged = edge.journal().release(release_id)
    if judged is not None:
        get_run_logger().info("%s was judged on %s: that verdict stands", release_id, judged.created_at)
        verdict = judged.gates
    else:
        verdict = gates.decide(evaluation, project.config.gates, project.config.champion_margin)
    create_table_artifact(
        key=f"gates-{slug(project.name)}",
        table=reports.gate_table(verdict),
        description=f"Gates: {verdict.summary}",
    )
    assert evaluation.report is not None
    page = edge.report_url(evaluation.report.uri)
    create_markdown_artifact(
        key=f"evaluation-{slug(project.name)}",
        markdown=reports.evaluation_page(
            evaluation,
            verdict,
            images={name: f"{page}{name}.png" for name in assessment.plot_names(edge.store(), evaluation)},
            links={"the whole page": f"{page}evaluation.html"},
        ),
        description="How good the model is on the newest days",
    )
    return verdict


@task
def compile_model(
    code: Source, project: Project, environment: ModelEnvironment, dataset: Dataset, model: TrainedModel
) -> ServingForm:
    """The fastest form of the model that says what it says; the model itself where there is none."""
    store, work = edge.store(), edge.work_folder()
    start, rows = snapshot.split(dataset, project.config)
    trained = assessment.restore_model(store, model, work / "compile")
    output, plan = training.compile_model(
        project,
        edge.project_folder(code),
        edge.environment_python(environment),
        edge.snapshot_file(dataset),
        trained,
        start,
        rows,
        work,
        get_run_logger().info,
    )
    form = assessment.keep_form(store, project, output, plan)
    create_markdown_artifact(
        key=f"serving-{slug(project.name)}",
        markdown=reports.serving_page(form),
        description=f"How the release is served: {form.path}",
    )
    assessment.check_form(project.config, form)
    return form
