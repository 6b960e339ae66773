#!/usr/bin/env bash
# Starts an MLflow server on loopback, if MLFLOW_TRACKING_URI says so and none runs yet.
set -euo pipefail
[ "$MLFLOW_TRACKING_URI" = http://127.0.0.1:5000 ] || exit 0
if ! (exec 3<>/dev/tcp/127.0.0.1/5000) 2>/dev/null; then
    cd ~
    setsid nohup mlflow server --host 127.0.0.1 --port 5000 --workers 1 \
        --backend-store-uri "sqlite:///$HOME/mlflow.db" >mlflow.log 2>&1 </dev/null &
fi
