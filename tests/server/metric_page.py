"""What /metrics says, as tests look at it."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families


async def scrape(http):
    """Samples by name and by (name, label, value), summed over other labels."""
    values = {}
    for family in text_string_to_metric_families((await http.get("/metrics")).text):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0) + sample.value
            for item in sample.labels.items():
                values[sample.name, *item] = values.get((sample.name, *item), 0) + sample.value
    return values


def is_total(key):
    """Whether a key of `scrape` is of something that never falls."""
    name = key if isinstance(key, str) else key[0]
    return name.endswith(("_total", "_count", "_sum", "_bucket"))
