"""The dashboard "Medusa: speculation": whether drafts pay, and which of them come true."""

from __future__ import annotations

from collections.abc import Sequence

from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models.dashboard import Dashboard, Panel

from deploy.grafana.panels import bars, distribution, page, series, stats
from deploy.grafana.promql import gauge, increase, mean, quantile, rate, ratio, ratio_by

TOKENS_PER_S = "suffix: tok/s"
DRAFTS = "spec_decode_num_drafts_total"
OFFERED = "spec_decode_num_draft_tokens_total"
ACCEPTED = "spec_decode_num_accepted_tokens_total"
NODES = "spec_decode_num_tree_nodes_total"
HEAD_HITS = "spec_decode_head_hits_total"
BY_SOURCE = "spec_decode_accepted_by_source_total"
STEP_COST = "decode_step_cost_seconds_total"
DRAFT_COST = "draft_cost_seconds_total"
PLAIN_COST = "plain_decode_cost_seconds_total"


def speculation() -> Dashboard:
    """The dashboard."""
    return page(
        "medusa-speculation",
        "Medusa: speculation",
        description="Does speculation pay, and what comes of the drafts of heads and prompt lookup.",
        top=_top(),
        rows=[("Does it pay", _gain()), ("Acceptance", _acceptance()), ("Tree", _tree()), ("Heads and lookup", _sources())],
    )


def _speedup(by: str = "") -> str:
    return ratio(rate(PLAIN_COST, by=by), rate(STEP_COST, by=by))


def _tokens_per_step() -> str:
    """Of decode steps, per choice: a plain step gives one, a step with a draft what it kept."""
    tokens = f"({rate('acceptance_length_sum')} + {rate('plain_steps_total')})"
    return ratio(tokens, f"({rate('acceptance_length_count')} + {rate('plain_steps_total')})")


def _top() -> Sequence[Builder[Panel]]:
    return [
        stats(
            "Speed-up",
            _speedup(),
            unit="suffix:x",
            decimals=2,
            description="What plain decoding would have taken over what decoding took, by step costs measured at start-up.",
            low="red",
            steps=[(0.98, "yellow"), (1.05, "green")],
        ),
        stats(
            "Tokens per step",
            _tokens_per_step(),
            unit="none",
            decimals=2,
            description="Of all decode steps, per choice, plain steps included.",
        ),
        stats(
            "Acceptance length",
            mean("acceptance_length"),
            unit="none",
            decimals=2,
            description="Tokens kept per step that had draft nodes, bonus included. 1: no draft was right.",
            low="red",
            steps=[(1.2, "green")],
        ),
        stats(
            "Drafts right",
            ratio(rate(ACCEPTED), rate(OFFERED)),
            unit="percentunit",
            decimals=0,
            description="Accepted draft tokens over the longest path that each tree offered.",
        ),
        stats(
            "Output from drafts",
            ratio(rate(ACCEPTED), rate("generation_tokens_total")),
            unit="percentunit",
            decimals=0,
            description="Share of the output that was drafted before the model agreed.",
        ),
        stats(
            "Drafting",
            ratio(rate(DRAFT_COST), rate(STEP_COST)),
            unit="percentunit",
            decimals=0,
            description="Share of decoding time that goes into making drafts.",
        ),
        stats(
            "Nodes per draft",
            f"1 + {ratio(rate(NODES), rate(DRAFTS))}",
            unit="none",
            decimals=1,
            description="Mean size of the trees that were offered, root included.",
        ),
        stats("Output", rate("generation_tokens_total"), unit=TOKENS_PER_S, decimals=1, description="Tokens that clients got."),
    ]


def _gain() -> Sequence[Builder[Panel]]:
    tokens = rate("generation_tokens_total")
    return [
        series(
            "Speed-up against plain decoding",
            [(_speedup(by="instance"), "{{instance}}")],
            unit="suffix:x",
            width=6,
            description="By step costs measured at start-up; none with a fixed --tree-size. Below 1 answers come slower.",
            line_at=1,
        ),
        series(
            "Decoding time per token",
            [(ratio(rate(STEP_COST), tokens), "with speculation"), (ratio(rate(PLAIN_COST), tokens), "plain, estimated")],
            unit="s",
            width=6,
            description="Engine time by measured step costs, shared by all running choices, over the tokens of all.",
        ),
        series(
            "Drafting share",
            [(ratio(rate(DRAFT_COST, by="instance"), rate(STEP_COST, by="instance")), "{{instance}}")],
            unit="percentunit",
            width=6,
            description="Share of decoding time that goes into making drafts.",
            is_share=True,
        ),
        series(
            "Tokens per step",
            [(_tokens_per_step(), "all decode steps"), (mean("acceptance_length"), "steps with a draft")],
            unit="none",
            width=6,
            description="Per choice. The two differ by the plain steps.",
        ),
        distribution(
            "Step latency",
            rate("step_latency_seconds_bucket", by="le"),
            unit="s",
            width=12,
            description="Engine steps per second by their duration, prompt chunks included.",
        ),
        series(
            "Step and token",
            [
                (quantile(0.5, "step_latency_seconds"), "step, p50"),
                (quantile(0.95, "step_latency_seconds"), "step, p95"),
                (quantile(0.5, "inter_token_latency_seconds"), "token, p50"),
                (quantile(0.95, "inter_token_latency_seconds"), "token, p95"),
            ],
            unit="s",
            width=12,
            description="Speculation makes steps longer and tokens come sooner.",
        ),
    ]


def _acceptance() -> Sequence[Builder[Panel]]:
    return [
        series(
            "Accepted by position",
            [
                (
                    ratio_by(rate("spec_decode_num_accepted_tokens_per_pos_total", by="position"), rate(DRAFTS)),
                    "position {{position}}",
                )
            ],
            unit="percentunit",
            width=8,
            description="Share of the drafts whose accepted path is longer than the position, which counts from 0.",
            is_share=True,
        ),
        series(
            "Acceptance length",
            [(ratio(rate("acceptance_length_sum", by="instance"), rate("acceptance_length_count", by="instance")), "{{instance}}")],
            unit="none",
            width=8,
            description="Mean over steps that had draft nodes, bonus included.",
        ),
        bars(
            "Steps by acceptance length",
            increase("acceptance_length_bucket", by="le"),
            legend="{{le}}",
            unit="short",
            width=8,
            description="Steps that had draft nodes, by the tokens kept, over the range shown.",
            is_histogram=True,
        ),
        distribution(
            "Acceptance length over time",
            rate("acceptance_length_bucket", by="le"),
            unit="none",
            width=8,
            description="Steps per second by the tokens kept.",
        ),
        series(
            "Draft tokens",
            [(rate(OFFERED), "offered"), (rate(ACCEPTED), "accepted"), (f"{rate(OFFERED)} - {rate(ACCEPTED)}", "rejected")],
            unit=TOKENS_PER_S,
            width=8,
            description="Offered is the longest path of each tree, so that the share accepted compares with chains.",
        ),
        series(
            "Draft tokens right",
            [(ratio(rate(ACCEPTED, by="instance"), rate(OFFERED, by="instance")), "{{instance}}")],
            unit="percentunit",
            width=8,
            description="Accepted over offered. Next to 100 % for long, answers may be repeating themselves.",
            is_share=True,
        ),
    ]


def _tree() -> Sequence[Builder[Panel]]:
    return [
        series(
            "Tree size",
            [
                (f"1 + {ratio(rate(NODES), rate(DRAFTS))}", "mean of the drafts"),
                (gauge("tree_size", function="avg"), "latest step"),
            ],
            unit="none",
            width=6,
            description="Nodes per choice, root included; 1 is plain decoding.",
        ),
        series(
            "Decode steps by tree size",
            [(rate("decode_steps_by_tree_size_total", by="nodes"), "{{nodes}} nodes")],
            unit="ops",
            width=6,
            description="What the controller chose. 1 node: plain.",
            is_stacked=True,
        ),
        series(
            "Steps of choices",
            [(rate(DRAFTS), "with a draft"), (rate("plain_steps_total"), "plain")],
            unit="ops",
            width=6,
            description="Decode steps, counted once for each choice in them.",
            is_stacked=True,
        ),
        series(
            "Nodes right",
            [(ratio(rate(ACCEPTED), rate(NODES)), "accepted of all nodes")],
            unit="percentunit",
            width=6,
            description="A tree offers many paths of which one can be right, so this falls as trees grow.",
        ),
    ]


def _sources() -> Sequence[Builder[Panel]]:
    return [
        series(
            "Accepted by source",
            [(rate(BY_SOURCE, by="source"), "{{source}}")],
            unit=TOKENS_PER_S,
            width=6,
            description="Draft tokens from the heads, and from prompt lookup.",
            is_stacked=True,
        ),
        series(
            "Share by source",
            [(ratio_by(rate(BY_SOURCE, by="source"), rate(BY_SOURCE)), "{{source}}")],
            unit="percentunit",
            width=6,
            description="Of accepted draft tokens.",
            is_share=True,
        ),
        series(
            "Head hits per draft",
            [(ratio_by(rate(HEAD_HITS, by="head"), rate(DRAFTS)), "head {{head}}")],
            unit="percentunit",
            width=6,
            description="Drafts in which the head filled an accepted node. Head 1 guesses the token after the next.",
            is_share=True,
        ),
        bars(
            "Head hits by rank",
            increase(HEAD_HITS, by="rank"),
            legend="rank {{rank}}",
            unit="short",
            width=6,
            description="Which of a head's guesses was right, best first, over the range shown: how wide trees should be.",
        ),
    ]
