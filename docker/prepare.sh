#!/usr/bin/env bash
# Makes what a broker with TLS and an access list needs, in FOLDER:
#
#   docker/prepare.sh FOLDER HOST[,HOST...] CLIENT...
#
#   ca.crt, ca.key           a certificate authority of your own; ca.key is needed nowhere but here
#   server.crt, server.key   the broker's certificate for these host names and addresses
#   users.acl                its access list
#   worker.env, operator.env, CLIENT.env
#                            the environment of each: HETRAIN_BROKER_URL, with a password in it and the CA at
#                            /etc/hetrain/ca.crt; HETRAIN_TENANT of a client; FLOWER_BASIC_AUTH of the operator
#
# The first HOST is the one in the URLs. What is there already stays as it is, so running it again with more
# clients adds these.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,/^set/{/^set/d;s/^# \?//;p}' "$0" >&2; exit 2; }
folder=$1 hosts=$2
shift 2
for client in "$@"; do
    [[ $client =~ ^[a-z][a-z0-9-]{0,31}$ && ! $client =~ ^(default|worker|operator|ca|server|flower)$ ]] ||
        { echo "$client: a client's name is a lower-case letter and up to 31 of a-z, 0-9 and -" >&2; exit 2; }
done
template=$(dirname "$(realpath "$0")")/users.acl.template

# The folder is closed; its files are not, since containers read them under users of their own.
umask 022
mkdir -p "$folder"
chmod 700 "$folder"
cd "$folder"
main=${hosts%%,*}

random() { head -c "$1" /dev/urandom | od -An -v -tx1 | tr -d ' \n'; }

# user NAME TEMPLATE'S-NAME TENANT: a line in users.acl, and the environment with the password in it.
user() {
    [ ! -e "$1.env" ] || return 0
    local password digest
    password=$(random 24)
    digest=$(printf %s "$password" | sha256sum | cut -d' ' -f1)
    sed -e '/^#/d' -e '/^$/d' "$template" | sed -e ':a' -e 'N' -e '$!ba' -e 's/\n  */ /g' | grep "^user $2 " |
        sed -e "s/^user $2 /user $1 /" -e "s/#SHA256/#$digest/" -e "s/TENANT/$3/" -e "s/LANE/${3:0:1}/" >>users.acl
    {
        echo "HETRAIN_BROKER_URL=rediss://$1:$password@$main:6380/0?ssl_ca_certs=/etc/hetrain/ca.crt"
        [ -z "$3" ] || echo "HETRAIN_TENANT=$3"
        [ "$1" != operator ] || echo "FLOWER_BASIC_AUTH=operator:$(random 16)"
    } >"$1.env"
}

[ -e users.acl ] || grep '^user default ' "$template" >users.acl
user worker worker ""
user operator operator ""
# A tenant's first digit is its lane; the clients have the lanes in turn.
for client in "$@"; do
    lane=$(printf %x $(($(grep -c '~gpu\.\*\.[0-9a-f]' users.acl || true) % 16)))
    tenant=$(random 8)
    user "$client" CLIENT "$lane${tenant:1}"
done

if [ ! -e ca.crt ]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -subj "/CN=hetrain CA" \
        -addext "keyUsage=critical,keyCertSign,cRLSign" -keyout ca.key -out ca.crt 2>/dev/null
    chmod 600 ca.key
fi
if [ ! -e server.crt ]; then
    names=
    for host in ${hosts//,/ }; do
        [[ $host =~ ^[0-9.]+$|: ]] && names+=",IP:$host" || names+=",DNS:$host"
    done
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$main" -keyout server.key \
        -out server.csr 2>/dev/null
    openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 825 -out server.crt \
        -extfile <(printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth\n' "${names#,}") 2>/dev/null
    chmod 644 server.key
    rm -f server.csr ca.srl
fi
