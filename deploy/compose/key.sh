#!/bin/sh
# Inside the router's container: makes a tenant if need be, and prints a new API key for it.
#   docker-compose exec -T router sh /config/key.sh TENANT
set -eu
export TIDEMILL_ADDRESS=localhost:7000 TIDEMILL_CA=/run/tidemill/ca.pem
TIDEMILL_ADMIN_KEY=$(cat /run/tidemill/admin.key)
export TIDEMILL_ADMIN_KEY
tidemill tenants create "$1" >&2
tidemill topup "$1" 100 --operation-id opening >&2  # once: a new tenant has no money
tidemill keys create --json --label compose "$1" | python -c 'import json, sys; print(json.load(sys.stdin)["key"])'
