# tinydns's data: NAME.wan.DOMAIN, NAME.lan.DOMAIN, and NAME.DOMAIN answered by where the client is (location "in" is
# private IPv4, "ex" any other).
# jq -r -L . --arg domain DOMAIN --arg server NAME-OF-THE-SERVER --arg address ITS-IPV4 -f tinydns.jq instances.json
include "addresses";
def hex: explode | map(if . > 96 then . - 87 else . - 48 end) | reduce .[] as $digit (0; . * 16 + $digit);
def octal: "\\" + ([. / 64, . / 8 % 8, . % 8] | map(floor | tostring) | add);
# an IPv6 address in RFC 5952 form as tinydns's octal bytes
def octets:
    (split("::") | map(split(":")) | if length == 2 then .[0] + [range(8 - (.[0] + .[1] | length)) | "0"] + .[1] else .[0] end)
    | map(hex | (. / 256 | floor | octal), (. % 256 | octal)) | add;
def record($name; $location):
    if contains(":") then ":\($name):28:\(octets):60::\($location)" else "+\($name):\(.):60::\($location)" end;
"%in:10", "%in:192.168", (range(16; 32) | "%in:172.\(.)"), "%ex:",
".\($domain):\($address):\($server):60",
(instances | .name as $name
    | (.wan[] | record("\($name).wan.\($domain)"; ""), record("\($name).\($domain)"; "ex")),
      (.lan[] | record("\($name).lan.\($domain)"; ""), record("\($name).\($domain)"; "in")))
