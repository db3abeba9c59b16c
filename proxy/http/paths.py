"""The paths of the gateway's own endpoints. RenderNet's path is in `proxy.upstream.address`."""

EXPLAIN_PATH = "/v1/explain"
PURGE_PATH = "/v1/cache/purge"
USAGE_PATH = "/v1/usage"
QUOTA_PATH = "/v1/quota"
METRICS_PATH = "/metrics"
