# A zone file (RFC 1035, section 5) with NAME.wan and NAME.lan.
# jq -r -L . --arg domain DOMAIN --arg server NAME-OF-THE-SERVER --argjson serial NUMBER -f zone.jq instances.json
include "addresses";
"$ORIGIN \($domain).",
"$TTL 60",
"@ SOA \($server). hostmaster \($serial) 3600 600 604800 60",
"@ NS \($server).",
(instances | .name as $name
    | (.wan[] | {address: ., side: "wan"}), (.lan[] | {address: ., side: "lan"})
    | "\($name).\(.side) \(if .address | contains(":") then "AAAA" else "A" end) \(.address)")
