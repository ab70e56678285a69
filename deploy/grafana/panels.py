"""The kinds of panels that the dashboards have, with the options that all of a kind share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self, TypeVar

from grafana_foundation_sdk.builders import bargauge, common, dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models.common import (
    AxisPlacement,
    BarGaugeDisplayMode,
    BigValueColorMode,
    BigValueGraphMode,
    DataSourceRef,
    GraphThresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import (
    Dashboard,
    DashboardCursorSync,
    DashboardLinkType,
    DataTransformerConfig,
    Panel,
    Threshold,
    ThresholdsMode,
    VariableModel,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG = "medusa"
# What Grafana 12.1 knows, the version in docker-compose.yml: any Grafana migrates older files, and refuses some uses of newer ones.
SCHEMA_VERSION = 41
# Grafana's grid has 24 columns.
STAT_SIZE = (3, 4)
PANEL_HEIGHT = 8

Row = tuple[str, Sequence[Builder[Panel]]]


class _AnyPanel(Protocol):
    """What the builders of all kinds of panels have in common."""

    def title(self, title: str) -> Self: ...
    def description(self, description: str) -> Self: ...
    def datasource(self, datasource: DataSourceRef) -> Self: ...
    def span(self, w: int) -> Self: ...
    def height(self, h: int) -> Self: ...


PanelT = TypeVar("PanelT", bound=_AnyPanel)


def stats(
    title: str,
    expr: str,
    *,
    unit: str,
    description: str,
    decimals: int | None = None,
    low: str = "green",
    steps: Sequence[tuple[float, str]] = (),
) -> stat.Panel:
    """One number with its recent past. steps: (value, colour from there on). low: the colour below the first."""
    panel = _described(stat.Panel(), title, description, STAT_SIZE)
    panel.unit(unit).with_target(_query(expr, "")).color_mode(BigValueColorMode.VALUE).graph_mode(BigValueGraphMode.AREA)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).thresholds(_thresholds(low, steps))
    return panel if decimals is None else panel.decimals(decimals)


def series(
    title: str,
    targets: Sequence[tuple[str, str]],
    *,
    unit: str,
    width: int,
    description: str,
    is_stacked: bool = False,
    is_share: bool = False,
    line_at: float | None = None,
) -> timeseries.Panel:
    """Lines over time. targets: (expression, legend). is_share: the axis ends at 1. line_at: a value to compare with."""
    panel = _described(timeseries.Panel(), title, description, (width, PANEL_HEIGHT))
    panel.unit(unit).min(0).line_width(1).fill_opacity(60 if is_stacked else 5).show_points(VisibilityMode.AUTO)
    panel.legend(common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM).show_legend(True))
    panel.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    for idx, (expr, legend) in enumerate(targets):
        panel.with_target(_query(expr, legend, idx=idx))
    if is_stacked:
        panel.stacking(common.StackingConfig().group("A").mode(StackingMode.NORMAL))
    if is_share:
        panel.max(1)
    if line_at is not None:
        panel.thresholds(_thresholds("red", [(line_at, "green")]))
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.DASHED))
    return panel


def distribution(title: str, expr: str, *, unit: str, width: int, description: str) -> heatmap.Panel:
    """A histogram's buckets over time. expr: by `le`, cumulative, as Prometheus has them."""
    panel = _described(heatmap.Panel(), title, description, (width, PANEL_HEIGHT))
    panel.with_target(_query(expr, "{{le}}").format(PromQueryFormat.HEATMAP)).calculate(False).cell_gap(1)
    return panel.y_axis(heatmap.YAxisConfig().unit(unit).axis_placement(AxisPlacement.LEFT))


def bars(
    title: str, expr: str, *, legend: str, unit: str, width: int, description: str, is_histogram: bool = False
) -> bargauge.Panel:
    """One bar for each series, over the whole range shown. is_histogram: `expr` is by `le`, cumulative."""
    panel = _described(bargauge.Panel(), title, description, (width, PANEL_HEIGHT))
    target = _query(expr, legend).instant()
    panel.with_target(target.format(PromQueryFormat.HEATMAP) if is_histogram else target)
    panel.unit(unit).min(0).orientation(VizOrientation.HORIZONTAL).display_mode(BarGaugeDisplayMode.BASIC)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).thresholds(_thresholds("green", ()))
    return panel


def facts(title: str, expr: str, *, hidden: Sequence[str], width: int, height: int, description: str) -> table.Panel:
    """The labels of a metric that is always 1, a line for each server. hidden: labels that say nothing here."""
    panel = _described(table.Panel(), title, description, (width, height))
    panel.with_target(_query(expr, "").format(PromQueryFormat.TABLE).instant())
    excluded = dict.fromkeys(("Time", "Value", "__name__", *hidden), True)
    return panel.with_transformation(DataTransformerConfig(id_val="organize", options={"excludeByName": excluded}))


def page(uid: str, title: str, *, description: str, top: Sequence[Builder[Panel]], rows: Sequence[Row]) -> Dashboard:
    """A dashboard: panels without a title above them, then rows."""
    result = dashboard.Dashboard(title).uid(uid).description(description).tags([TAG]).timezone("browser")
    result.refresh("10s").time("now-30m", "now").tooltip(DashboardCursorSync.CROSSHAIR).variables(_variables())
    links = dashboard.DashboardLink("Medusa").type(DashboardLinkType.DASHBOARDS).tags([TAG])
    result.link(links.include_vars(True).keep_time(True))
    for builder in top:
        result.with_panel(builder)
    for name, panels in rows:
        result.with_row(dashboard.Row(name))
        for builder in panels:
            result.with_panel(builder)
    built = result.build()
    built.schema_version = SCHEMA_VERSION
    # Grafana wants numbers of their own; in order, so that the file changes no more than the panels do.
    for idx, panel in enumerate(built.panels or (), start=1):
        panel.id_val = idx
    return built


def _variables() -> list[Builder[VariableModel]]:
    return [
        dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"),
        _choice("model_name", "Model", "label_values(medusa_num_requests_running, model_name)"),
        _choice("instance", "Server", "label_values(medusa_http_requests_total, instance)"),
    ]


def _choice(name: str, label: str, query: str) -> dashboard.QueryVariable:
    """All of a label's values, unless some are chosen."""
    variable = dashboard.QueryVariable(name).label(label).datasource(DATASOURCE).query({"query": query, "refId": name})
    variable.definition(query).refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).sort(VariableSort.ALPHABETICAL_ASC)
    return variable.multi(True).include_all(True).all_value(".*").current(VariableOption(text="All", value="$__all"))


def _described(panel: PanelT, title: str, description: str, size: tuple[int, int]) -> PanelT:
    width, height = size
    return panel.title(title).description(description).datasource(DATASOURCE).span(width).height(height)


def _query(expr: str, legend: str, *, idx: int = 0) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(expr).legend_format(legend).ref_id(chr(ord("A") + idx)).datasource(DATASOURCE)


def _thresholds(low: str, steps: Sequence[tuple[float, str]]) -> dashboard.ThresholdsConfig:
    # The lowest step has no value: it starts at minus infinity.
    found = [Threshold(value=None, color=low), *(Threshold(value=value, color=color) for value, color in steps)]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(found)
