#!/usr/bin/env bash
# Serve a model under a plan, and ask it once under the plan and once densely: examples/serve.sh MODEL [PLAN]
set -euo pipefail
MODEL=${1:?a checkpoint folder, or a name of the Hub}
PLAN=${2:-shortv}
PORT=${PORT:-8000}

vllm serve "$MODEL" --port "$PORT" --served-model-name model --block-size 32 \
  --additional-config "{\"vis_sparse\": {\"plan\": \"$PLAN\"}}" &
SERVER=$!
trap 'kill $SERVER' EXIT
until curl -sf "localhost:$PORT/health"; do
  kill -0 $SERVER
  sleep 1
done

IMAGE=$(python - <<'PYTHON'
import base64, io
from PIL import Image
file = io.BytesIO()
Image.new("RGB", (336, 336), "teal").save(file, "PNG")
print("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
PYTHON
)
for ASKED in "$PLAN" dense; do
  echo "$ASKED:"
  curl -s "localhost:$PORT/v1/chat/completions" -H 'Content-Type: application/json' --data @- <<JSON
{"model": "model", "max_tokens": 32, "temperature": 0, "vllm_xargs": {"vis_sparse_plan": "$ASKED"}, "messages": [
  {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "$IMAGE"}},
                               {"type": "text", "text": "What color is the shape?"}]}]}
JSON
  echo
done
curl -s "localhost:$PORT/metrics" | grep '^vis_sparse:'
